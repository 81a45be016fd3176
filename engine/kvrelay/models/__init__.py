"""Models: what a Hugging Face directory holds, where to get one, and our decoder that runs it.

`spec`, `hub`, `gguf` and `tokenizer` import no torch; `weights`, `rope` and `decoder` do.
"""
