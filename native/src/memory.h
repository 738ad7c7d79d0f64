// Aligned memory that a call owns while it runs.
#pragma once
#include <cstddef>
#include <cstdint>
#include <new>

namespace anyattn {

constexpr std::size_t kAlignment = 64;

// A 64-byte aligned block; data() is null where the system has no more memory.
class Block {
  public:
    explicit Block(int64_t bytes)
        : data_(bytes > 0 ? ::operator new(static_cast<std::size_t>(bytes), std::align_val_t(kAlignment), std::nothrow)
                          : nullptr) {}
    ~Block() { ::operator delete(data_, std::align_val_t(kAlignment)); }
    Block(const Block &) = delete;
    Block &operator=(const Block &) = delete;
    Block(Block &&other) noexcept : data_(other.data_) { other.data_ = nullptr; }
    Block &operator=(Block &&other) noexcept {
        void *mine = data_;
        data_ = other.data_;
        other.data_ = mine;
        return *this;
    }

    char *data() const { return static_cast<char *>(data_); }

  private:
    void *data_;
};

// Scratch for every worker of one call, taken from the calling thread: a small call allocates nothing.
class Scratch {
  public:
    explicit Scratch(int64_t bytes);
    ~Scratch();
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;

    char *data() const { return data_; }  // null: out of memory (or no bytes were asked for)

  private:
    Block own_{0};
    char *data_;
    bool from_thread_;
};

}  // namespace anyattn
