"""The vocabulary of an output: its tokens, where the models have their rows, its tokenizer and chat template."""
