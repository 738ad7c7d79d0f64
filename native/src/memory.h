// Aligned memory that a call owns while it runs.
#pragma once
#include <cstddef>
#include <cstdint>
#include <new>

namespace anyattn {

constexpr std::size_t kAlignment = 64;

// 64-byte aligned memory. data() is null if the allocation failed.
class Buffer {
  public:
    explicit Buffer(int64_t bytes)
        : data_(bytes > 0 ? ::operator new(static_cast<std::size_t>(bytes), std::align_val_t(kAlignment), std::nothrow)
                          : nullptr) {}
    ~Buffer() { ::operator delete(data_, std::align_val_t(kAlignment)); }
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    Buffer(Buffer &&other) noexcept : data_(other.data_) { other.data_ = nullptr; }
    Buffer &operator=(Buffer &&other) noexcept {
        void *mine = data_;
        data_ = other.data_;
        other.data_ = mine;
        return *this;
    }

    char *data() const { return static_cast<char *>(data_); }

  private:
    void *data_;
};

// Scratch memory for every worker of one call. The calling thread keeps it, so that small calls allocate nothing.
class Scratch {
  public:
    explicit Scratch(int64_t bytes);
    ~Scratch();
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;

    char *data() const { return data_; }  // null: out of memory, or no bytes were requested

  private:
    Buffer own_{0};
    char *data_;
    bool from_thread_;
};

}  // namespace anyattn
