from pathlib import Path

import pytest

RUN = """\
models:
  student: {init_from: somewhere/teacher, trainable: true}
  teacher: {init_from: "${models.student.init_from}"}
  critic: {init_from: "${models.student.init_from}", trainable: true}
method:
  _target_: fv_distill.methods.DMD2Method
  generator_update_interval: 3
training:
  output_dir: outputs/run
  data: {data_path: rows, latent_shape: [4, 3, 4, 4]}
  optimizer: {learning_rate: 2e-4, betas: [0, 0.99]}
  loop: {max_train_steps: 2}
callbacks:
  ema: {decay: 0.9}
"""


@pytest.fixture
def run_file(tmp_path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path
