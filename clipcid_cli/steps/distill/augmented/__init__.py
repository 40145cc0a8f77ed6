"""What training shows in place of an image or a caption: its stored views, and variants of its captions."""
