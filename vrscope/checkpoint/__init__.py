"""Reading and writing safetensors checkpoints as streams of row blocks."""
