from pathguard.client.requests import Options, split
from tests.service.fakes import image_of


def test_parts_stay_within_the_message_limit():
    images = [image_of(value) for value in range(100)]
    parts = list(split(images, 5000))
    assert sum(len(part.problems) for part in parts) == 100
    assert max(Options().request(part.messages).ByteSize() for part in parts) <= 5000
