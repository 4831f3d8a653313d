"""Containers and bytes: safetensors, torch archives, folders of them, atomic writing. Knows no optimizer state."""
