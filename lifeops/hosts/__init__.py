"""What is known of other people's Vision Transformers, once: the only place that names their classes and attributes."""
