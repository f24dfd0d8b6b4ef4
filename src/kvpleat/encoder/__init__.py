"""Encoders (BERT and its kin): tokens merge between layers, in order, and the outputs keep their shape."""
