"""Images for a packed network: arrays written by numpy.save, and pictures (PNG, JPEG, ...)."""
import warnings

import numpy as np

from twta import TwtaError, files

FORMATS = 'PNG', 'JPEG', 'WEBP', 'GIF', 'BMP'  # pillow reads many more, less well tested
BRIGHT = 128  # grey level; the border of a handwritten digit is darker


def read_images(path, shape):
    """Return the images of an .npy file, uint8 [n, *shape]; shape is [height, width, channels].

    A single image may be [height, width, channels]; images of one channel may lack that axis. Raises TwtaError if the
    file cannot be read or holds other images.
    """
    try:
        images = files.read_npy(path)
    except files.UNREADABLE as error:
        reason = getattr(error, 'strerror', None) or 'damaged, or no array of numbers'
        raise TwtaError(f'{path}: {reason}; give images written by numpy.save') from None
    wanted = f'uint8 [n, {", ".join(map(str, shape))}]'
    if images.dtype != np.uint8:
        raise TwtaError(f'{path}: {images.dtype}, but the network takes {wanted}')
    found = list(images.shape)
    if images.shape == (*shape[:2], 1)[:images.ndim] or images.shape == shape:
        images = images[np.newaxis]
    if images.ndim == 3 and shape[2] == 1:
        images = images[..., np.newaxis]
    if not len(images):
        raise TwtaError(f'{path}: {found} has no images; the network takes {wanted}')
    if images.shape[1:] != tuple(shape):
        raise TwtaError(f'{path}: {found}, but the network takes {wanted}')
    return images


def read_picture(path, shape):
    """Return a picture as an image, uint8 of that shape [height, width, channels].

    It is turned as its camera says, made grey or coloured as the network needs, cut to the network's proportions about
    its centre, and resized. What is transparent becomes white. Raises TwtaError if it cannot be read.
    """
    if shape[2] not in (1, 3):
        raise TwtaError(f'{path}: the network takes images of {shape[2]} channels, a picture has 1 or 3; give a '
                        '.npy file')
    try:
        from PIL import Image, ImageOps  # here: arrays need no pillow
    except ImportError:
        raise TwtaError(f'{path}: pictures need pillow; pip install pillow') from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            warnings.simplefilter('error', Image.DecompressionBombWarning)
            picture = ImageOps.exif_transpose(Image.open(path, formats=FORMATS))
            if picture.mode.startswith('I'):  # 16 bits; convert would cut them off at 255
                picture = Image.fromarray((np.asarray(picture).clip(0, 65535) / 257).astype(np.uint8))
            if 'A' in picture.getbands() or 'transparency' in picture.info:
                ground = Image.new('RGBA', picture.size, 'white')
                picture = Image.alpha_composite(ground, picture.convert('RGBA'))
            picture = picture.convert('L' if shape[2] == 1 else 'RGB')
            picture = ImageOps.fit(picture, (shape[1], shape[0]), Image.Resampling.BICUBIC)
    except (*files.UNREADABLE, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = getattr(error, 'strerror', None) or f'damaged, or none of {", ".join(FORMATS)}'
        if 'Decompression' in type(error).__name__:
            reason = 'too large, more than 89 million pixels'
        raise TwtaError(f'{path}: {reason}') from None
    return np.asarray(picture).reshape(shape)


def have_bright_borders(images):
    """Return whether the border of most images, [n, height, width, channels], is bright: a digit on white paper."""
    edges = np.concatenate([images[:, [0, -1]].reshape(len(images), -1),
                            images[:, :, [0, -1]].reshape(len(images), -1)], axis=1)
    return bool(np.median(edges.mean(1)) >= BRIGHT)
