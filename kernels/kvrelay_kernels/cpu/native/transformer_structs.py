"""The structs and signatures of ``csrc/api.h`` that describe a transformer. Knows the C interface only."""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p


class LinearStruct(ctypes.Structure):
    _fields_ = (
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("num_in", c_int64),
        ("num_out", c_int64),
        ("dtype", c_int32),
    )


class LayerStruct(ctypes.Structure):
    _fields_ = (
        ("input_norm", c_void_p),
        ("qk_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("qkv", LinearStruct),
        ("output", LinearStruct),
        ("gate_up", LinearStruct),
        ("down", LinearStruct),
    )


class ModelStruct(ctypes.Structure):
    _fields_ = (
        ("layers", c_void_p),
        ("embedding", LinearStruct),
        ("head", LinearStruct),
        ("norm", c_void_p),
        ("inverse_frequencies", c_void_p),
        ("hidden", c_int64),
        ("intermediate", c_int64),
        ("vocab", c_int64),
        ("num_layers", c_int32),
        ("num_q_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("num_threads", c_int32),
        ("eps", c_float),
        ("rotary_factor", c_float),
    )


class StepStruct(ctypes.Structure):
    _fields_ = (
        ("token_ids", c_void_p),
        ("seq_lens", c_void_p),
        ("block_table", c_void_p),
        ("k_pages", c_void_p),
        ("v_pages", c_void_p),
        ("k_stride", c_int64 * 3),
        ("v_stride", c_int64 * 3),
        ("batch", c_int64),
        ("table_stride", c_int64),
        ("max_blocks", c_int64),
        ("num_blocks", c_int64),
        ("kv_dtype", c_int32),
        ("logits", c_void_p),
        ("stats", c_void_p),
        ("selecting", c_void_p),
    )


class SelectingStruct(ctypes.Structure):
    _fields_ = (
        ("config", c_void_p),
        ("dense_layers", c_void_p),
        ("counts", c_void_p),
        ("lists_per_group", c_int32),
    )


SIGNATURES = {
    "kvr_panel": (),
    "kvr_pack": (c_void_p, c_void_p, c_void_p, c_int32),
    "kvr_linear": (c_void_p, c_int64, c_void_p, c_int32, c_void_p),
    "kvr_embed": (c_void_p, c_void_p, c_int64, c_void_p),
    "kvr_rotary": (c_void_p, c_void_p, c_int64, c_void_p),
    "kvr_before_attention": (c_void_p, c_int32, c_void_p, c_void_p, c_int64, c_void_p),
    "kvr_after_attention": (c_void_p, c_int32, c_void_p, c_int64, c_void_p),
    "kvr_last_norm": (c_void_p, c_void_p, c_int64, c_void_p),
    "kvr_step": (c_void_p, c_void_p),
}
