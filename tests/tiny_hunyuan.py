"""Complete HunyuanVideo pipeline directories with random weights, small enough to be made in every test session."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import (
    DEFAULT_PROMPT_TEMPLATE as IMAGE_PROMPT_TEMPLATE,
)
from tiny_models import WORDS
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    ByT5Tokenizer,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

TEXT_DIM = 16
POOLED_DIM = 8
GLYPH_DIM = 8
LATENT_CHANNELS = 4
FLOW_SHIFT = 7.0
# The tokens of an image alone, at most, and some of text.
IMAGE_TEXT_LENGTH = 288 + 16
# Words that stand for a template's first tokens, which the pipelines crop by their number.
_SYSTEM = "system"
# Of the template with an image: the pipeline looks for the first and the last.
_MARKS = ("<image>", "<|start_header_id|>", "<|eot_id|>", "<|end_header_id|>")


def make_tiny_hunyuan_transformer(seed: int = 0, **config: object) -> HunyuanVideoTransformer3DModel:
    """One block of each kind, two heads."""
    torch.manual_seed(seed)
    sizes = {
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "text_embed_dim": TEXT_DIM,
        "pooled_projection_dim": POOLED_DIM,
        "rope_axes_dim": (4, 4, 4),
    }
    return HunyuanVideoTransformer3DModel(**{**sizes, **config})


def make_tiny_hunyuan_directory(path: Path, *, seed: int = 0) -> Path:
    """Save tokenizers, LLaMA, CLIP, VAE (temporal 4, spatial 8), transformer and scheduler as one pipeline."""
    torch.manual_seed(seed)
    llama = LlamaModel(_llama_config())
    prefix = DEFAULT_PROMPT_TEMPLATE["template"].split("{}")[0]
    HunyuanVideoPipeline(
        text_encoder=llama.eval(),
        tokenizer=make_tiny_tokenizer(
            {prefix: f"{_SYSTEM} " * DEFAULT_PROMPT_TEMPLATE["crop_start"], "<|eot_id|>": ""}
        ),
        text_encoder_2=make_tiny_clip(),
        tokenizer_2=make_tiny_tokenizer({}),
        vae=make_tiny_hunyuan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
        transformer=make_tiny_hunyuan_transformer(seed),
    ).save_pretrained(path)
    return path


def make_tiny_hunyuan_i2v_directory(path: Path, *, kind: str = "token_replace", seed: int = 0) -> Path:
    """The same with LLaVA, whose image has 576 tokens of a pixel each, as an image-to-video pipeline of this kind."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=1
    )
    tokenizer = make_tiny_image_tokenizer()
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=_llama_config(),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            pad_token_id=0,
        )
    )
    in_channels = 2 * LATENT_CHANNELS + 1 if kind == "latent_concat" else LATENT_CHANNELS
    HunyuanVideoImageToVideoPipeline(
        text_encoder=llava.eval(),
        tokenizer=tokenizer,
        text_encoder_2=make_tiny_clip(),
        tokenizer_2=make_tiny_tokenizer({}),
        vae=make_tiny_hunyuan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
        transformer=make_tiny_hunyuan_transformer(
            seed,
            in_channels=in_channels,
            image_condition_type=kind,
            # As the two published ones.
            guidance_embeds=kind == "token_replace",
        ),
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}),
    ).save_pretrained(path)
    return path


def make_tiny_image_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that makes of the template with an image as many tokens as the published one."""
    _, description = IMAGE_PROMPT_TEMPLATE["template"].split("<image>\n")
    description = description.split("<|eot_id|>")[0]
    # What is cropped: tokens before the image, the image, these words, and the four of the user's header.
    missing = IMAGE_PROMPT_TEMPLATE["crop_start"] - IMAGE_PROMPT_TEMPLATE["image_emb_start"] - 5
    tokenizer = make_tiny_tokenizer({_SYSTEM: f"{_SYSTEM} " * 3, description: f"{_SYSTEM} " * missing})
    tokenizer.add_special_tokens({"additional_special_tokens": list(_MARKS)})
    return tokenizer


def _llama_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(WORDS) + 4 + len(_MARKS),
        hidden_size=TEXT_DIM,
        intermediate_size=32,
        # The pipelines read the layer before the last two.
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )


def make_tiny_clip() -> CLIPTextModel:
    """One layer."""
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(WORDS) + 4,
            hidden_size=POOLED_DIM,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=77,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )
    return clip.eval()


def make_tiny_tokenizer(replaced: dict[str, str]) -> PreTrainedTokenizerFast:
    """A tokenizer of a few words that first replaces strings, as templates by so many words as they have tokens."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", _SYSTEM, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    steps = [normalizers.Replace(old, new) for old, new in replaced.items()]
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def make_tiny_hunyuan_vae() -> AutoencoderKLHunyuanVideo:
    """Temporal 4, spatial 8."""
    return AutoencoderKLHunyuanVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.476986,
        mid_block_add_attention=True,
    )


def make_tiny_hunyuan15_transformer(seed: int = 0, **config: object) -> HunyuanVideo15Transformer3DModel:
    """Two blocks, two heads."""
    torch.manual_seed(seed)
    sizes = {
        "in_channels": 2 * LATENT_CHANNELS + 1,
        "out_channels": LATENT_CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "text_embed_dim": TEXT_DIM,
        "text_embed_2_dim": GLYPH_DIM,
        "image_embed_dim": 6,
        "rope_axes_dim": (4, 4, 4),
        "target_size": 32,
        "task_type": "t2v",
    }
    return HunyuanVideo15Transformer3DModel(**{**sizes, **config})


def make_tiny_hunyuan15_directory(path: Path, *, seed: int = 0) -> Path:
    """Save tokenizers, Qwen, T5 over bytes, VAE (temporal 4, spatial 16), transformer and scheduler as one pipeline."""
    HunyuanVideo15Pipeline(**_components15(seed)).save_pretrained(path)
    return path


def make_tiny_hunyuan15_i2v_directory(path: Path, *, seed: int = 0) -> Path:
    """The same with SigLIP, as an image-to-video pipeline."""
    components = _components15(seed)
    siglip = SiglipVisionConfig(
        hidden_size=6, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    HunyuanVideo15ImageToVideoPipeline(
        **components,
        image_encoder=SiglipVisionModel(siglip).eval(),
        feature_extractor=SiglipImageProcessorPil(size={"height": 8, "width": 8}),
    ).save_pretrained(path)
    return path


def _components15(seed: int) -> dict[str, object]:
    torch.manual_seed(seed)
    qwen = Qwen2_5_VLTextModel(
        Qwen2_5_VLTextConfig(
            vocab_size=len(WORDS) + 4,
            hidden_size=TEXT_DIM,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=256,
            rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
            pad_token_id=0,
        )
    )
    byt5 = T5EncoderModel(T5Config(vocab_size=384, d_model=GLYPH_DIM, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=LATENT_CHANNELS, block_out_channels=(4, 4, 4, 8, 8), layers_per_block=1
    )
    return {
        "text_encoder": qwen.eval(),
        "tokenizer": make_tiny_chat_tokenizer(num_system_tokens=108),
        "text_encoder_2": byt5.eval(),
        "tokenizer_2": ByT5Tokenizer(),
        "vae": vae,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
        "transformer": make_tiny_hunyuan15_transformer(seed),
        "guider": ClassifierFreeGuidance(guidance_scale=4.0),
    }


def make_tiny_chat_tokenizer(*, num_system_tokens: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose chat template puts so many tokens before the user's words."""
    tokenizer = make_tiny_tokenizer({})
    tokenizer.chat_template = (
        "{{ '" + f"{_SYSTEM} " * num_system_tokens + "' }}{% for message in messages %}{% if message.role == 'user' %}"
        "{{ message.content if message.content is string else message.content[0].text }}{% endif %}{% endfor %}"
        # As templates end each turn: no text is empty.
        "{{ ' " + _SYSTEM + "' }}"
    )
    return tokenizer
