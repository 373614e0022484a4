"""A complete tiny `WanPipeline` directory for the digits: tokenizer, text encoder, VAE, scheduler and a transformer.

The text encoder is a frozen random UMT5, and the VAE's weights are set by hand to fold space into channels, so that the
pipeline's real code runs without either having been trained.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from fv_distill.data.digits import CAPTIONS, PATCH, TEXT_LENGTH

FLOW_SHIFT = 3.0
LATENT_CHANNELS = PATCH * PATCH
TEXT_DIM = 32
RGB = 3
# A constant channel this large makes RMS norm a division by a constant: the other channels are below 1 / 64 of it.
_NORM_ANCHOR = 256.0


def build_transformer(seed: int) -> WanTransformer3DModel:
    """A Wan network of 0.6 M parameters, initialised so that it learns quickly.

    Gates start at 1 instead of 0, so that every block takes part from the first step, and the output starts at zero.
    """
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=256,
        num_layers=4,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )
    with torch.no_grad():
        for block in transformer.blocks:
            block.scale_shift_table[:, [2, 5]] += 1.0
        transformer.proj_out.weight.zero_()
        transformer.proj_out.bias.zero_()
    return transformer


def build_pipeline(transformer: WanTransformer3DModel, *, latents_mean: Tensor, latents_std: Tensor) -> WanPipeline:
    """The whole pipeline around a transformer; the statistics are per channel, `[16]`."""
    return WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=build_text_encoder(),
        vae=build_vae(latents_mean, latents_std),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
        transformer=transformer,
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def build_text_encoder() -> UMT5EncoderModel:
    """A frozen random encoder of one layer."""
    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=len(build_tokenizer()),
        d_model=TEXT_DIM,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        is_gated_act=True,
        dropout_rate=0.0,
    )
    return UMT5EncoderModel(config).eval().requires_grad_(False)


def build_vae(latents_mean: Tensor, latents_std: Tensor) -> AutoencoderKLWan:
    """A Wan VAE that folds grey space by 4 x 4 into 16 channels and back, exact to rounding.

    Each channel x travels as the pair (x, -x), since silu(x) - silu(-x) = x; all residual branches are zero.
    """
    channels = LATENT_CHANNELS
    width = 2 * channels + 2
    vae = AutoencoderKLWan(
        base_dim=width,
        z_dim=channels,
        dim_mult=[1],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[],
        in_channels=RGB * channels,
        out_channels=RGB * channels,
        patch_size=PATCH,
        scale_factor_temporal=1,
        scale_factor_spatial=PATCH,
        latents_mean=latents_mean.tolist(),
        latents_std=latents_std.tolist(),
    )
    index = torch.arange(channels)
    encoder, decoder = vae.encoder, vae.decoder
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            parameter.fill_(1.0 if "gamma" in name else 0.0)
        for color in range(RGB):
            encoder.conv_in.weight[2 * index, color * channels + index, 2, 1, 1] = 1 / RGB
            encoder.conv_in.weight[2 * index + 1, color * channels + index, 2, 1, 1] = -1 / RGB
            decoder.conv_out.weight[color * channels + index, 2 * index, 2, 1, 1] = 1.0
            decoder.conv_out.weight[color * channels + index, 2 * index + 1, 2, 1, 1] = -1.0
        encoder.conv_out.weight[index, 2 * index, 2, 1, 1] = 1.0
        encoder.conv_out.weight[index, 2 * index + 1, 2, 1, 1] = -1.0
        decoder.conv_in.weight[2 * index, index, 2, 1, 1] = 1.0
        decoder.conv_in.weight[2 * index + 1, index, 2, 1, 1] = -1.0
        vae.quant_conv.weight[index, index] = 1.0
        vae.quant_conv.bias[channels:] = -30.0  # log-variance: the encoder is deterministic
        vae.post_quant_conv.weight[index, index] = 1.0
        for part in (encoder, decoder):
            part.conv_in.bias[2 * channels] = _NORM_ANCHOR
            part.norm_out.gamma.fill_(_NORM_ANCHOR / width**0.5)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_captions(directory: Path, captions: list[str]) -> Tensor:
    """Text embeddings `[N, 8, 32]`, zero at padding, as the pipeline itself computes them."""
    pipeline = WanPipeline.from_pretrained(directory, transformer=None, vae=None)
    embeddings, _ = pipeline.encode_prompt(
        captions, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH, device=torch.device("cpu")
    )
    return embeddings
