"""The KV-cache loop and sampling."""
