"""From a folder of image files to uint8 crops and view parameters: index, read, decode, crop (DESIGN.md section 3)."""
