// The inner loops of the depthwise convolution; see vectors.inl.
#include "vectors.inl"

namespace sparkme {
namespace {

// A neighbour of an output pixel that is visible, and its tap.
template <typename T>
struct Neighbour {
  const T *row;
  int32_t tap;
};

// The channels from `c` on, as long as `Vectors` vectors fit; returns where it stopped.
template <typename T, int Bytes, int Vectors>
int64_t convolve_channels(const Neighbour<T> *neighbours, int32_t count, const Sum<T> *kernel, int64_t channels, int64_t c,
                          T *out) {
  using V = VectorOf<Sum<T>, Bytes>;
  constexpr int kStep = V::kLanes * Vectors;
  for (; c + kStep <= channels; c += kStep) {
    typename V::Vector sum[Vectors] = {};
    for (int32_t i = 0; i < count; ++i) {
      const T *row = neighbours[i].row + c;
      const Sum<T> *weights = kernel + neighbours[i].tap * channels + c;
      for (int v = 0; v < Vectors; ++v)
        sum[v] += load<T, Bytes>(row + v * V::kLanes) * load<Sum<T>, Bytes>(weights + v * V::kLanes);
    }
    for (int v = 0; v < Vectors; ++v) store<T, Bytes>(out + c + v * V::kLanes, sum[v]);
  }
  return c;
}

template <typename T>
void convolve(const DepthwisePatch<T> &patch, const Sum<T> *kernel, T *out) {
  constexpr int kBytes = SPARKME_VECTOR_BYTES;
  std::vector<Neighbour<T>> neighbours(patch.height * patch.width);
  for (int32_t y = 0; y < patch.side; ++y) {
    for (int32_t x = 0; x < patch.side; ++x, out += patch.channels) {
      int32_t count = 0;
      for (int32_t tap = 0; tap < patch.height * patch.width; ++tap) {
        const int32_t row = y * patch.stride + tap % patch.height * patch.dilation,
                      column = x * patch.stride + tap / patch.height * patch.dilation;
        const T *source = patch.tile[row * patch.tile_columns + column];
        if (source != patch.zero) neighbours[count++] = {source, tap};
      }
      int64_t c = convolve_channels<T, kBytes, 4>(neighbours.data(), count, kernel, patch.channels, 0, out);
      c = convolve_channels<T, kBytes, 1>(neighbours.data(), count, kernel, patch.channels, c, out);
      convolve_channels<T, 0, 1>(neighbours.data(), count, kernel, patch.channels, c, out);
    }
  }
}

// Taps [tap, tap + Taps) of one kernel column, of the channels from `c` on; returns where it stopped.
template <typename T, int Bytes, int Vectors, int Taps>
int64_t correlate_channels(const DepthwisePatch<T> *patches, const T *const *grads, int64_t count, int32_t tap, int64_t c,
                           Sum<T> *sums) {
  using V = VectorOf<Sum<T>, Bytes>;
  constexpr int kStep = V::kLanes * Vectors;
  const int64_t channels = patches[0].channels;
  for (; c + kStep <= channels; c += kStep) {
    typename V::Vector sum[Taps][Vectors];
    for (int t = 0; t < Taps; ++t)
      for (int v = 0; v < Vectors; ++v) sum[t][v] = load<Sum<T>, Bytes>(sums + (tap + t) * channels + c + v * V::kLanes);
    for (int64_t i = 0; i < count; ++i) {
      const DepthwisePatch<T> &patch = patches[i];
      const int32_t first_row = tap % patch.height * patch.dilation, column = tap / patch.height * patch.dilation;
      for (int32_t y = 0; y < patch.side; ++y) {
        for (int32_t x = 0; x < patch.side; ++x) {
          const T *grad = grads[i] + (y * patch.side + x) * channels + c;
          typename V::Vector g[Vectors];
          for (int v = 0; v < Vectors; ++v) g[v] = load<T, Bytes>(grad + v * V::kLanes);
          const T *const *source = patch.tile + (y * patch.stride + first_row) * patch.tile_columns + x * patch.stride + column;
          for (int t = 0; t < Taps; ++t) {
            const T *row = source[t * patch.dilation * patch.tile_columns] + c;
            for (int v = 0; v < Vectors; ++v) sum[t][v] += g[v] * load<T, Bytes>(row + v * V::kLanes);
          }
        }
      }
    }
    for (int t = 0; t < Taps; ++t)
      for (int v = 0; v < Vectors; ++v) store<Sum<T>, Bytes>(sums + (tap + t) * channels + c + v * V::kLanes, sum[t][v]);
  }
  return c;
}

template <typename T, int Taps>
void correlate_taps(const DepthwisePatch<T> *patches, const T *const *grads, int64_t count, Sum<T> *sums) {
  constexpr int kBytes = SPARKME_VECTOR_BYTES;
  for (int32_t tap = 0; tap < patches[0].height * patches[0].width; tap += Taps) {
    int64_t c = correlate_channels<T, kBytes, 2, Taps>(patches, grads, count, tap, 0, sums);
    c = correlate_channels<T, kBytes, 1, Taps>(patches, grads, count, tap, c, sums);
    correlate_channels<T, 0, 1, Taps>(patches, grads, count, tap, c, sums);
  }
}

// As many taps of a kernel column at once as its height allows: each needs registers of its own.
template <typename T>
void correlate(const DepthwisePatch<T> *patches, const T *const *grads, int64_t count, Sum<T> *sums) {
  switch (patches[0].height) {
    case 7:
      return correlate_taps<T, 7>(patches, grads, count, sums);
    case 5:
      return correlate_taps<T, 5>(patches, grads, count, sums);
    case 3:
      return correlate_taps<T, 3>(patches, grads, count, sums);
    default:
      return correlate_taps<T, 1>(patches, grads, count, sums);
  }
}

}  // namespace
}  // namespace sparkme
