# make demo   set up, distil the digits teacher, show what came out
# make demo-lora     the same, and a student that is a LoRA on the teacher's network
# make demo-causal   the same, into a student that streams
# make test   set up, run the tests
# make style  format and mend what can be mended;  make quality  check only

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
WORKERS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo demo-lora demo-causal test style quality clean

demo: $(STAMP)
	$(BIN)/fv-distill demo

demo-lora: $(STAMP)
	$(BIN)/fv-distill demo --lora --output-dir outputs/demo-lora

demo-causal: $(STAMP)
	$(BIN)/python examples/scenarios/causal_wan/run.py --overwrite

# A thread each: tests are small, and two workers that share cores with their own threads wait for each other.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n $(WORKERS) --dist loadfile

style: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

quality: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV)

# Written last, so that an interrupted set-up starts over.
$(STAMP): setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@
