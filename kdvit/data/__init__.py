"""Data: batches of images, each image a function of (run seed, epoch, image, repeat) alone."""

from kdvit.data.arrays import Arrays
from kdvit.data.base import ImageDataModule
from kdvit.data.digits import Digits
from kdvit.data.fashion_mnist import FashionMNIST
from kdvit.data.image_folder import ImageFolder
from kdvit.data.image_table import ImageTable
from kdvit.data.images import Images
from kdvit.data.timm_data import TimmData

__all__ = ["Arrays", "Digits", "FashionMNIST", "ImageDataModule", "ImageFolder", "ImageTable", "Images", "TimmData"]
