"""What raystill asks of Ray and its neighbours: configuration, connection, storage, tracking, pretrained models.

Nothing here imports `services` or `jobs`.
"""
