import torch

from betavae.data.fingerprint import BLOCK_BYTES, MAX_HASHED_BYTES, fingerprint
from betavae.data.image_set import ImageSet


def test_blocks_of_a_large_set_are_hashed_from_start_to_end():
    class Counted:
        shape = (10**7, 1, 32, 32)  # 10 GB
        changed, rows = -1, 0

        def index_select(self, dim, index):
            self.rows += len(index)
            return (index == self.changed).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 32, 32)

    def read(**changes):
        pixels = Counted()
        vars(pixels).update(changes)
        return fingerprint(ImageSet(pixels, torch.zeros(1))), pixels.rows * 1024

    before, count = read()
    assert MAX_HASHED_BYTES / 2 < count <= MAX_HASHED_BYTES + BLOCK_BYTES
    assert all(read(changed=row)[0] != before for row in (0, 10**7 - 1))
    assert read(shape=(10**7 + 1, 1, 32, 32))[0] != before


def test_each_pixel_name_and_if_asked_label_counts():
    pixels, labels = torch.zeros(5, 1, 2, 2, dtype=torch.uint8), torch.arange(5)
    other = pixels.clone()
    other[4, 0, 1, 1] = 1
    images = ImageSet(pixels, labels, names=list("abcde"))
    sets = [images, ImageSet(other, labels, names=list("abcde")), ImageSet(pixels, labels, names=list("abcdf"))]
    assert len({fingerprint(s) for s in sets}) == 3
    relabeled = ImageSet(pixels, labels + 1, names=list("abcde"))
    assert fingerprint(images) == fingerprint(relabeled)
    assert fingerprint(images, labels=True) != fingerprint(relabeled, labels=True)
