"""Which tensors of a model cannot bear quantization, which statistics foretell it, and what to spare."""
