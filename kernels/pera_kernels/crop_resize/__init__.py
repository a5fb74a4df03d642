"""Op `crop_resize`: crops of images of any number of bands, 8 or 16 bits, resized on the CPU."""

from .dispatch import crop_resize, crops_of_image

__all__ = ["crop_resize", "crops_of_image"]
