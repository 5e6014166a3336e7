"""What an input tensor can be besides stored: rows of several models, or computed from an adapter."""
