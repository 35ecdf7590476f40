"""The main job: zero-shot learning on real handwritten digits, from data to attention maps (extra `zsl`)."""
