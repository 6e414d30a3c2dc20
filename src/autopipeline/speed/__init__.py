"""What makes networks faster without changing what they compute: they stay plain, and this stays outside of them."""
