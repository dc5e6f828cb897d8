"""Models as files: signature, inputs, messages, and the native runtime as reference."""
