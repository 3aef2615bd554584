"""Everything that touches transformers: loading, saving, generating, quantizing through `GPTQConfig`."""
