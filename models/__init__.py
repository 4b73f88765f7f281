"""The bundled emoji model: its data step, its training and its evaluation."""
