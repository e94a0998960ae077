"""What tests share: tiny models and tokenizers, runs and how they are compared, pages."""
