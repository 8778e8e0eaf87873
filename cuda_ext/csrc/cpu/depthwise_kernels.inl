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
int64_t convolve_channels(const Neighbour<T> *neighbours, int32_t count, const Sum<T> *kernel, const Sum<T> *bias,
                          int64_t channels, int64_t c, T *out) {
  using V = VectorOf<Sum<T>, Bytes>;
  constexpr int kStep = V::kLanes * Vectors;
  for (; c + kStep <= channels; c += kStep) {
    typename V::Vector sum[Vectors] = {};
    if (bias)
      for (int v = 0; v < Vectors; ++v) sum[v] = load<Sum<T>, Bytes>(bias + c + v * V::kLanes);
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

constexpr int32_t kOutputs = 4;  // of a line that are summed together

// A line of the window over kOutputs pixels: what it reads, and its first tap.
template <typename T>
struct Line {
  const T *const *rows;
  int32_t tap;
};

template <typename T, int Bytes, int Width>
int64_t convolve_lines(const Line<T> *lines, int32_t count, const Sum<T> *kernel, const Sum<T> *bias, int32_t height,
                       int64_t channels, int64_t c, T *out) {
  using V = VectorOf<Sum<T>, Bytes>;
  for (; c + V::kLanes <= channels; c += V::kLanes) {
    typename V::Vector sums[kOutputs] = {}, inputs[kOutputs + Width - 1];
    if (bias)
      for (auto &sum : sums) sum = load<Sum<T>, Bytes>(bias + c);
    for (int32_t i = 0; i < count; ++i) {
      for (int x = 0; x < kOutputs + Width - 1; ++x) inputs[x] = load<T, Bytes>(lines[i].rows[x] + c);
      for (int dx = 0; dx < Width; ++dx) {
        const auto weight = load<Sum<T>, Bytes>(kernel + (dx * height + lines[i].tap) * channels + c);
        for (int x = 0; x < kOutputs; ++x) sums[x] += inputs[x + dx] * weight;
      }
    }
    for (int x = 0; x < kOutputs; ++x) store<T, Bytes>(out + x * channels + c, sums[x]);
  }
  return c;
}

// Without stride and dilation outputs next to each other share inputs and weights; hidden pixels are zeros among them.
template <typename T, int Width>
void convolve_by_lines(const DepthwisePatch<T> &patch, const Sum<T> *kernel, const Sum<T> *bias, T *out) {
  std::vector<Line<T>> lines(patch.height);
  for (int32_t y = 0; y < patch.side; ++y) {
    for (int32_t x = 0; x < patch.side; x += kOutputs, out += kOutputs * patch.channels) {
      int32_t count = 0;
      for (int32_t tap = 0; tap < patch.height; ++tap) {
        const T *const *rows = patch.tile + (y + tap) * patch.tile_columns + x;
        if (std::any_of(rows, rows + kOutputs + Width - 1, [&](const T *row) { return row != patch.zero; }))
          lines[count++] = {rows, tap};
      }
      const int64_t c = convolve_lines<T, SPARKME_VECTOR_BYTES, Width>(lines.data(), count, kernel, bias, patch.height,
                                                                       patch.channels, 0, out);
      convolve_lines<T, 0, Width>(lines.data(), count, kernel, bias, patch.height, patch.channels, c, out);
    }
  }
}

template <typename T>
void convolve(const DepthwisePatch<T> &patch, const Sum<T> *kernel, const Sum<T> *bias, T *out) {
  constexpr int kBytes = SPARKME_VECTOR_BYTES;
  if (patch.side % kOutputs == 0 && patch.stride == 1 && patch.dilation == 1 && !patch.spread) {
    if (patch.width == 7) return convolve_by_lines<T, 7>(patch, kernel, bias, out);
    if (patch.width == 5) return convolve_by_lines<T, 5>(patch, kernel, bias, out);
    if (patch.width == 3) return convolve_by_lines<T, 3>(patch, kernel, bias, out);
  }
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
      int64_t c = convolve_channels<T, kBytes, 4>(neighbours.data(), count, kernel, bias, patch.channels, 0, out);
      c = convolve_channels<T, kBytes, 1>(neighbours.data(), count, kernel, bias, patch.channels, c, out);
      convolve_channels<T, 0, 1>(neighbours.data(), count, kernel, bias, patch.channels, c, out);
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

// Line `tap` of the window, of the channels from `c` on; Outputs pixels next to each other share inputs.
template <typename T, int Bytes, int Width, int Outputs>
int64_t correlate_line(const DepthwisePatch<T> *patches, const T *const *grads, int64_t count, int32_t tap, int64_t c,
                       Sum<T> *sums) {
  using V = VectorOf<Sum<T>, Bytes>;
  const int64_t channels = patches[0].channels;
  const int32_t side = patches[0].side, columns = patches[0].tile_columns, height = patches[0].height;
  for (; c + V::kLanes <= channels; c += V::kLanes) {
    typename V::Vector sum[Width], inputs[Outputs + Width - 1];
    for (int dx = 0; dx < Width; ++dx) sum[dx] = load<Sum<T>, Bytes>(sums + (dx * height + tap) * channels + c);
    for (int64_t i = 0; i < count; ++i) {
      const T *grad = grads[i] + c;
      for (int32_t y = 0; y < side; ++y) {
        for (int32_t x = 0; x < side; x += Outputs, grad += Outputs * channels) {
          const T *const *rows = patches[i].tile + (y + tap) * columns + x;
          for (int j = 0; j < Outputs + Width - 1; ++j) inputs[j] = load<T, Bytes>(rows[j] + c);
          for (int j = 0; j < Outputs; ++j) {
            const auto g = load<T, Bytes>(grad + j * channels);
            for (int dx = 0; dx < Width; ++dx) sum[dx] += g * inputs[j + dx];
          }
        }
      }
    }
    for (int dx = 0; dx < Width; ++dx) store<Sum<T>, Bytes>(sums + (dx * height + tap) * channels + c, sum[dx]);
  }
  return c;
}

template <typename T, int Width, int Outputs>
void correlate_by_lines(const DepthwisePatch<T> *patches, const T *const *grads, int64_t count, Sum<T> *sums) {
  for (int32_t tap = 0; tap < patches[0].height; ++tap) {
    const int64_t c = correlate_line<T, SPARKME_VECTOR_BYTES, Width, Outputs>(patches, grads, count, tap, 0, sums);
    correlate_line<T, 0, Width, Outputs>(patches, grads, count, tap, c, sums);
  }
}

// For a window of Size taps along a side; 0 stands for any.
template <typename T, int Size>
void correlate_window(const DepthwisePatch<T> *patches, const T *const *grads, int64_t count, Sum<T> *sums) {
  const DepthwisePatch<T> &first = patches[0];
  if constexpr (Size > 0) {
    if (first.width == Size && first.stride == 1 && first.dilation == 1) {
      if (first.side % 4 == 0) return correlate_by_lines<T, Size, 4>(patches, grads, count, sums);
      if (first.side % 2 == 0) return correlate_by_lines<T, Size, 2>(patches, grads, count, sums);
    }
  }
  correlate_taps<T, Size == 0 ? 1 : Size>(patches, grads, count, sums);
}

// As many taps of a kernel column at once as its height allows: each needs registers of its own.
template <typename T>
void correlate(const DepthwisePatch<T> *patches, const T *const *grads, int64_t count, Sum<T> *sums) {
  switch (patches[0].height) {
    case 7:
      return correlate_window<T, 7>(patches, grads, count, sums);
    case 5:
      return correlate_window<T, 5>(patches, grads, count, sums);
    case 3:
      return correlate_window<T, 3>(patches, grads, count, sums);
    default:
      return correlate_window<T, 0>(patches, grads, count, sums);
  }
}

}  // namespace
}  // namespace sparkme
