"""What people do with an autoencoder besides compressing: functions of a model, images and a generator.

Images are in [-1, 1] and on the model's device. Decoded ones are about [-1, 1] and not clamped. A generator may live
on the CPU whatever the device: a seed then means the same everywhere.
"""
