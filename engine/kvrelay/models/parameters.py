"""The parameters of a decoder, by their Hugging Face names, with their shapes. No torch."""

from kvrelay.models.spec import ModelSpec

Shape = tuple[int, ...]


def parameter_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Return every parameter a checkpoint of `spec` must hold -> its shape (linear weights are [out, in])."""
    shapes: dict[str, Shape] = {
        "model.embed_tokens.weight": (spec.vocab_size, spec.hidden_size),
        "model.norm.weight": (spec.hidden_size,),
    }
    if not spec.tie_word_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, spec.hidden_size)
    for layer in range(spec.num_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes(spec).items()}
    return shapes


def layer_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Return the parameters of one layer, without the `model.layers.N.` prefix -> shape."""
    q_size, kv_size = spec.num_q_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    linears = {
        "self_attn.q_proj": (q_size, spec.hidden_size, spec.qkv_bias),
        "self_attn.k_proj": (kv_size, spec.hidden_size, spec.qkv_bias),
        "self_attn.v_proj": (kv_size, spec.hidden_size, spec.qkv_bias),
        "self_attn.o_proj": (spec.hidden_size, q_size, spec.output_bias),
        "mlp.gate_proj": (spec.intermediate_size, spec.hidden_size, spec.mlp_bias),
        "mlp.up_proj": (spec.intermediate_size, spec.hidden_size, spec.mlp_bias),
        "mlp.down_proj": (spec.hidden_size, spec.intermediate_size, spec.mlp_bias),
    }
    shapes: dict[str, Shape] = {
        "input_layernorm.weight": (spec.hidden_size,),
        "post_attention_layernorm.weight": (spec.hidden_size,),
    }
    for name, (num_out, num_in, has_bias) in linears.items():
        shapes[f"{name}.weight"] = (num_out, num_in)
        if has_bias:
            shapes[f"{name}.bias"] = (num_out,)
    if spec.qk_norm:
        shapes |= {"self_attn.q_norm.weight": (spec.head_dim,), "self_attn.k_norm.weight": (spec.head_dim,)}
    return shapes
