"""One rule for all faces: what the command line, the Python API, recipes and ComfyUI's nodes differ in, as a list that only shrinks."""
