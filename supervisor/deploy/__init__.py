"""Units, images and manifests, rendered from one description of the service."""
