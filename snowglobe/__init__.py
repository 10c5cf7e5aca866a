"""The snowglobe: a miniature world that stands in for COCO and for the pretrained models."""
