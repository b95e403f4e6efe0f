"""Data: batches of images, each image a function of (run seed, epoch, image, repeat) alone."""

from kdvit.data.base import ImageDataModule
from kdvit.data.digits import Digits
from kdvit.data.fashion_mnist import FashionMNIST
from kdvit.data.image_folder import ImageFolder

__all__ = ["Digits", "FashionMNIST", "ImageDataModule", "ImageFolder"]
