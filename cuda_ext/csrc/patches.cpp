// The gradients of copying dense maps to rows and back: each is the other's.
#include "cpu/patches.cpp"

#include "autograd.h"

namespace sparkme {
namespace {

struct Voxelise : Function<Voxelise> {
  static Tensor forward(Context *ctx, const Tensor &dense, const Tensor &slots, const Tensor &patches, int64_t pixels) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({slots, patches});
    ctx->saved_data["pixels"] = pixels;
    return SPARKME_CALL(voxelise, dense, slots, patches, pixels);
  }

  static variable_list backward(Context *ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    return {SPARKME_CALL(densify, grads[0], saved[0], saved[1], ctx->saved_data["pixels"].toInt(), std::nullopt), Tensor(),
            Tensor(), Tensor()};
  }
};

struct Densify : Function<Densify> {
  static Tensor forward(Context *ctx, const Tensor &rows, const Tensor &slots, const Tensor &patches, int64_t pixels,
                        const Optional &fill) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({slots, patches});
    ctx->saved_data["pixels"] = pixels;
    ctx->saved_data["rows"] = rows.requires_grad();
    ctx->saved_data["fill"] = differs(fill);
    ctx->saved_data["type"] = fill ? fill->scalar_type() : rows.scalar_type();
    return SPARKME_CALL(densify, rows, slots, patches, pixels, fill);
  }

  static variable_list backward(Context *ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor grad_rows = SPARKME_CALL(voxelise, grads[0], saved[0], saved[1], ctx->saved_data["pixels"].toInt());
    variable_list out(5);
    if (ctx->saved_data["rows"].toBool()) out[0] = grad_rows;
    if (ctx->saved_data["fill"].toBool()) {  // of all pixels, less the visible ones
      const auto wide = at::promote_types(grads[0].scalar_type(), at::kFloat);
      const Tensor pixels = grads[0].permute({0, 2, 3, 1}).flatten(0, 2);
      out[4] = (pixels.sum(0, false, wide) - grad_rows.sum(0, false, wide)).to(ctx->saved_data["type"].toScalarType());
    }
    return out;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(sparkme, Autograd, m) {
  m.impl("voxelise", differentiable<Voxelise>());
  m.impl("densify", differentiable<Densify>());
}

}  // namespace sparkme
