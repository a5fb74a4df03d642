"""Fine-tunes a backbone on labelled images, runs the result on new ones, and makes feature maps for detectors.

`api.finetune`, `predict.predict` and `pyramid.SimpleFeaturePyramid` with `detection.DetectionBackbone` are public.
"""
