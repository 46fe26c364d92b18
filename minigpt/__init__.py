"""Small language models that one person can train, understand, prove and ship."""

__version__ = "0.1.0.dev0"
