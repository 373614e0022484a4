"""A trained student as a diffusers directory, and Wan weights between that and their original form."""

from fv_distill._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "checkpoint_weights": ["load_role_weights", "read_checkpoint_metadata"],
        "convert": ["convert"],
        "convert_wan": ["causal_info", "convert_wan_checkpoint", "convert_wan_to_original"],
        "diffusers_dir": ["export_diffusers_directory"],
        "hub": ["HubError", "push_checkpoint", "push_directory"],
        "lora_file": ["LoraWeights", "export_lora_directory", "merge_lora", "write_comfyui_lora"],
        "model_card": ["refresh_model_card", "write_model_card"],
        "scheduler": ["few_step_scheduler", "few_step_scheduler_for"],
        "student_info": ["StudentInfo"],
        "wan_checkpoint": ["OriginalCheckpoint", "read_original_checkpoint"],
        "wan_keys": ["convert_state_dict", "convert_state_dict_to_original"],
    },
)
