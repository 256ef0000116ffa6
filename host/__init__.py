"""What knows ComfyUI's insides: quantised weights, operations, names, loading, sampling."""
