"""The judge: a small CNN that names a clip's digit and direction, and whose features feed a Frechet distance."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fv_distill.data.digits import DIRECTIONS, NUM_FRAMES

JUDGE_FILE = Path(__file__).with_name("judge.safetensors")


class Judge(nn.Module):
    """Two small towers: one sees each frame alone and names the digit, one sees all frames and names the direction."""

    def __init__(self, num_frames: int = NUM_FRAMES) -> None:
        super().__init__()
        self.digit_tower = nn.Sequential(
            *_conv(1, 32, stride=1), *_conv(32, 64, stride=2), *_conv(64, 96, stride=1), *_pooled(96, 48)
        )
        self.motion_tower = nn.Sequential(
            *_conv(num_frames, 24, kernel=5, stride=1), *_conv(24, 32, kernel=5, stride=2), *_conv(32, 32, stride=2),
            nn.Flatten(), nn.Linear(32 * 16, 24), nn.ReLU(),
        )  # fmt: skip
        self.digit_head = nn.Linear(48, 10)
        self.direction_head = nn.Linear(24, len(DIRECTIONS))

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the judge makes of clips `[N, 1, F, 16, 16]`.

        Returns:
            Features `[N, 72]`, digit log-probabilities `[N, 10]` and direction logits `[N, 4]`.
        """
        count, _, frames, height, width = clips.shape
        each = self.digit_tower(clips.reshape(count * frames, 1, height, width)).view(count, frames, -1)
        digit = self.digit_head(each).log_softmax(-1).mean(1)
        motion = self.motion_tower(clips[:, 0])
        return torch.cat([each.mean(1), motion], dim=1), digit, self.direction_head(motion)

    @torch.no_grad()
    def classify(self, clips: Tensor, *, batch_size: int = 500) -> tuple[Tensor, Tensor]:
        """Features `[N, 72]` and the index of the caption that fits best `[N]`."""
        features, captions = [], []
        for part in clips.split(batch_size):
            feature, digit, direction = self(part)
            features.append(feature)
            captions.append(digit.argmax(1) * len(DIRECTIONS) + direction.argmax(1))
        return torch.cat(features), torch.cat(captions)


def load_judge(path: Path = JUDGE_FILE) -> Judge:
    """A judge that the repository ships, ready to use."""
    weights = load_file(path)
    judge = Judge(num_frames=weights["motion_tower.0.weight"].shape[1])
    judge.load_state_dict(weights)
    return judge.eval()


def _conv(channels_in: int, channels_out: int, *, stride: int, kernel: int = 3) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels_in, channels_out, kernel, stride=stride, padding=kernel // 2)
    return convolution, nn.BatchNorm2d(channels_out), nn.ReLU()


def _pooled(channels: int, features: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(channels, features), nn.ReLU()
