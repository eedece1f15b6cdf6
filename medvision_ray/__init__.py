"""medvision_ray: distributed batch scoring and training for medical images on Ray."""

__version__ = "0.1.0"
