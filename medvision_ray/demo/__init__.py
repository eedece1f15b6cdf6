"""A phantom hospital: seeded images of nobody, to try every job without a patient's data."""

from medvision_ray.demo.archive import PhantomArchive, make_archive
from medvision_ray.demo.phantom import CLASSES, MODALITIES, draw_phantom

__all__ = ["CLASSES", "MODALITIES", "PhantomArchive", "draw_phantom", "make_archive"]
