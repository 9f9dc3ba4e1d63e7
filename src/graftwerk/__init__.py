"""graftwerk: small trained adapters on frozen language models."""
