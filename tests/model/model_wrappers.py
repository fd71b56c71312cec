TEXT = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False, "max_position_embeddings": 128,
}
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}
QWEN = {"depth": 1, "hidden_size": 32, "num_heads": 4, "patch_size": 14, "out_hidden_size": 48, "intermediate_size": 64, "window_size":28, "fullatt_block_indexes":[0]}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
WRAPPERS = {
    "llava": {"text_config": TEXT | {"model_type": "llama"}, "vision_config": VISION, "image_token_index": 96},
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral"},
        "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8},
        "image_token_index": 96,
    },
    "gemma3": {
        "text_config": TEXT | {"query_pre_attn_scalar": 8, "sliding_window": 8},
        "vision_config": VISION | {"vision_use_head": False},
        "mm_tokens_per_image": 4,
        "image_token_index": 96,
    },
    "qwen2_5_vl": {"text_config": TEXT|MROPE, "vision_config": QWEN, "image_token_id": 96, "video_token_id":95, "vision_start_token_id": 94, "vision_end_token_id":93},
    "qwen3_5": {"text_config": TEXT | {"layer_types": ["linear_attention","full_attention","full_attention"], "linear_num_key_heads":2,"linear_num_value_heads":2,"linear_key_head_dim":8,"linear_value_head_dim":8}, "vision_config": {"depth":1,"hidden_size":32,"num_heads":4,"intermediate_size":64,"patch_size":14,"out_hidden_size":48,"num_position_embeddings":16}, "image_token_id": 96, "video_token_id":95},
    "gemma4": {"text_config": TEXT | {"sliding_window": 8, "vocab_size_per_layer_input":97, "hidden_size_per_layer_input":8}, "vision_config": VISION},
}
