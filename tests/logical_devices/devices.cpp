// An accelerator that is not there: "pretend:0", "pretend:1", …, each with a capacity of its own, on torch's PrivateUse1 backend.
//
// Its memory is host memory and its kernels are the CPU's, but for everything above them it is a card: tensors have a device,
// mixing two is an error, every byte is counted by device, and what is beyond the capacity is torch.OutOfMemoryError.

#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;
constexpr int64_t kBlock = 512;  // what a card's allocator rounds to

// ---- Memory: one ledger for all devices ------------------------------------------------------------------------------

struct Account {
  int64_t capacity = 0, used = 0, peak = 0;
};

std::vector<Account> accounts(1);
thread_local c10::DeviceIndex current = 0;
std::mutex ledger;
std::unordered_map<void*, std::pair<c10::DeviceIndex, int64_t>> blocks;  // where each lies, and its size

void release(void* pointer) {
  if (pointer == nullptr) return;
  {
    std::lock_guard<std::mutex> guard(ledger);
    auto block = blocks.find(pointer);
    TORCH_INTERNAL_ASSERT(block != blocks.end());
    accounts[block->second.first].used -= block->second.second;
    blocks.erase(block);
  }
  std::free(pointer);
}

struct Allocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t wanted) override {
    const auto device = current;
    void* pointer = nullptr;
    if (wanted > 0) {
      const auto size = (static_cast<int64_t>(wanted) + kBlock - 1) / kBlock * kBlock;
      std::lock_guard<std::mutex> guard(ledger);
      auto& account = accounts.at(device);
      TORCH_CHECK_WITH(
          OutOfMemoryError, account.capacity == 0 || account.used + size <= account.capacity, "pretend:", int(device),
          " is out of memory: tried to allocate ", size, " bytes; ", account.used, " of ", account.capacity, " in use");
      TORCH_CHECK(posix_memalign(&pointer, 64, size) == 0, "the host is out of memory");
      account.used += size;
      account.peak = std::max(account.peak, account.used);
      blocks[pointer] = {device, size};
    }
    return {pointer, pointer, &release, c10::Device(kDevice, device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t size) const override { default_copy_data(to, from, size); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    std::lock_guard<std::mutex> guard(ledger);
    c10::CachingDeviceAllocator::DeviceStats stats;
    for (auto* bytes : {&stats.allocated_bytes, &stats.reserved_bytes}) {  // nothing is kept for later
      (*bytes)[0].current = accounts.at(device).used;
      (*bytes)[0].peak = accounts.at(device).peak;
    }
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex device) override {
    std::lock_guard<std::mutex> guard(ledger);
    accounts.at(device).peak = accounts.at(device).used;
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    std::lock_guard<std::mutex> guard(ledger);
    const auto& account = accounts.at(device);
    return {account.capacity - account.used, account.capacity};
  }
};

Allocator allocator;

// ---- Devices: which is current, and how many there are ----------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return c10::Device(kDevice, current); }
  void setDevice(c10::Device device) const override {
    if (!device.has_index()) return;
    TORCH_CHECK(device.index() < deviceCount(), device, " does not exist, there are ", int(deviceCount()));
    current = device.index();
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) current = device.index();
  }
  c10::DeviceIndex deviceCount() const noexcept override { return static_cast<c10::DeviceIndex>(accounts.size()); }
  // One stream a device, and everything is done when it is asked for.
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream) const override { return getStream(getDevice()); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return Guard().deviceCount(); }
  void setCurrentDevice(c10::DeviceIndex device) const override { Guard().setDevice(c10::Device(kDevice, device)); }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    return Guard().exchangeDevice(c10::Device(kDevice, device)).index();
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override { return exchangeDevice(device); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    at::native::resize_bytes_cpu(storage.unsafeGetStorageImpl(), size);
  }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
};

// ---- Tensors: made, seen in other ways, copied ------------------------------------------------------------------------

c10::Device chosen(std::optional<c10::Device> asked) {
  return asked.has_value() && asked->has_index() ? *asked : c10::Device(kDevice, current);
}

at::Tensor empty(
    c10::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<c10::Device> device,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(chosen(device));
  return at::detail::empty_generic(sizes, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::IntArrayRef sizes, c10::IntArrayRef strides, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<c10::Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(chosen(device));
  return at::detail::empty_strided_generic(sizes, strides, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

// The same memory as a CPU tensor.
at::Tensor on_cpu(const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.is_cpu()) return tensor;
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), at::TensorOptions().dtype(tensor.scalar_type()));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  if (from.numel() > 0) on_cpu(to).copy_(on_cpu(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

const at::Tensor& resize_(const at::Tensor& tensor, at::SymIntArrayRef sizes, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(tensor.device());
  return at::native::resize_(tensor, C10_AS_INTARRAYREF_SLOW(sizes), format);
}

at::Tensor& set_(at::Tensor& tensor, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  if (strides.size() == sizes.size()) {
    impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides), offset.expect_int());
  } else {
    impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(sizes));
    impl->set_storage_offset(offset.expect_int());
  }
  return tensor;
}

at::Scalar local_scalar(const at::Tensor& tensor) { return on_cpu(tensor).item(); }

// Copied back to its own device, where it counts.
at::Tensor to_device(const at::Tensor& tensor, c10::Device device) { return tensor.defined() ? tensor.to(device) : tensor; }

// ---- Attention: a kernel that keeps its output and a number a row, as those of cards do --------------------------------

int64_t attention_backend(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double dropout, bool,
    std::optional<double>, bool) {
  return static_cast<int64_t>(dropout == 0.0 ? sdp::SDPBackend::overrideable : sdp::SDPBackend::math);
}

using Attention = std::tuple<
    at::Tensor, at::Tensor, at::Tensor, at::Tensor, c10::SymInt, c10::SymInt, at::Tensor, at::Tensor, at::Tensor>;

Attention attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const std::optional<at::Tensor>& bias, double,
    bool is_causal, bool, std::optional<double> scale) {
  std::optional<at::Tensor> mask;
  if (bias.has_value()) mask = on_cpu(*bias);
  auto [output, sums] = at::_scaled_dot_product_flash_attention_for_cpu(
      on_cpu(query), on_cpu(key), on_cpu(value), 0.0, is_causal, mask, scale);
  const auto none = at::empty({0}, query.options());
  return {to_device(output, query.device()), to_device(sums, query.device()), none, none, query.size(2), key.size(2), none, none, none};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& bias,
    std::array<bool, 4>, const at::Tensor& output, const at::Tensor& sums, const at::Tensor&, const at::Tensor&, c10::SymInt,
    c10::SymInt, double, bool is_causal, const at::Tensor&, const at::Tensor&, std::optional<double> scale) {
  std::optional<at::Tensor> mask;
  if (bias.defined()) mask = on_cpu(bias);
  auto [queries, keys, values] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      on_cpu(grad), on_cpu(query), on_cpu(key), on_cpu(value), on_cpu(output), on_cpu(sums), 0.0, is_causal, mask, scale);
  const auto device = query.device();
  return {to_device(queries, device), to_device(keys, device), to_device(values, device), at::Tensor()};
}

// ---- Everything else: the CPU's kernel, where all operands lie on one device -------------------------------------------

void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  std::optional<c10::Device> device;
  const auto look_at = [&](const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.device().type() != kDevice) return;
    TORCH_CHECK(
        !device.has_value() || *device == tensor.device(), "Expected all tensors to be on the same device, but found at least two devices, ",
        *device, " and ", tensor.device(), ", in ", op.schema().name());
    device = tensor.device();
  };
  for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (value.isTensor()) {
      look_at(value.toTensor());
    } else if (value.isTensorList()) {
      for (const auto& tensor : value.toTensorVector()) look_at(tensor);
    }
  }
  c10::OptionalDeviceGuard guard(device);
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("as_strided", at::native::as_strided_tensorimpl);
  library.impl("view", at::native::view);
  library.impl("_reshape_alias", at::native::_reshape_alias);
  library.impl("unfold", at::native::unfold);
  library.impl("resize_", &resize_);
  library.impl("set_.source_Tensor", at::native::set_tensor_);
  library.impl("set_.source_Storage", at::native::set_);
  library.impl("set_.source_Storage_storage_offset", &set_);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("_local_scalar_dense", &local_scalar);
  // A card has a kernel for it; left alone it is written out in six products.
  library.impl("silu_backward", torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>());
  library.impl("_scaled_dot_product_fused_attention_overrideable", &attention);
  library.impl("_scaled_dot_product_fused_attention_overrideable_backward", &attention_backward);
}

// Autocast as a card has it.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) { library.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define IN_HALF(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define IN_FP32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define IN_FP32_BY_DTYPE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define IN_THE_WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(IN_HALF)
  AT_FORALL_FP32(IN_FP32)
  AT_FORALL_FP32_SET_OPT_DTYPE(IN_FP32_BY_DTYPE)
  AT_FORALL_PROMOTE(IN_THE_WIDEST)
}

}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &attention_backend)
}

TORCH_LIBRARY(pretend, library) {
  // One device for each capacity in bytes; 0 is without end.
  library.def("register_devices(int[] capacities) -> ()", [](at::IntArrayRef capacities) {
    accounts.assign(capacities.size(), Account());
    for (size_t device = 0; device < capacities.size(); ++device) accounts[device].capacity = capacities[device];
    c10::SetAllocator(kDevice, &allocator, 1);
    at::RegisterPrivateUse1HooksInterface(new Hooks());
  });
}
