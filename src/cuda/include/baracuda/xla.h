// SPDX-License-Identifier: Apache-2.0
// XLA's interface for foreign functions (FFI), what of it a handler needs: JAX calls an operation
// in compiled programs. The layout is that of xla/ffi/api/c_api.h, major version 0, whose
// structures grow at their ends only.
//
// A handler gets the operation's arguments of api.h as bytes, the attribute "problem", after the
// number of threads. Each pointer in them that is not NULL takes the next buffer, in the order of
// `take`.
#pragma once

#include <stdint.h>
#include <string.h>

#include "baracuda/api.h"

namespace bcy::xla {

struct Extension {
  size_t size;
  int type;  // kMetadata
  Extension* next;
};
constexpr int kMetadata = 1;

struct Version {
  size_t size;
  Extension* extension;
  int major, minor;
};

struct Metadata {
  size_t size;
  Version version;
  uint32_t traits;
};
constexpr uint32_t kCommandBufferCompatible = 1;  // may be captured in a CUDA graph

struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

struct Error;
struct CreateError {
  size_t size;
  Extension* extension;
  const char* message;
  int code;
};
constexpr int kInvalidArgument = 3, kResourceExhausted = 8, kInternal = 13;

struct Context;
struct GetStream {
  size_t size;
  Extension* extension;
  Context* ctx;
  void* stream;  // out
};

struct Api {
  size_t size;
  Extension* extension;
  Version version;
  const void* internal;
  Error* (*create_error)(CreateError*);
  void (*get_message)(void*);
  void (*destroy_error)(void*);
  Error* (*register_handler)(void*);
  Error* (*get_stream)(GetStream*);
};

struct Buffer {
  size_t size;
  Extension* extension;
  int type;
  void* data;
  int64_t rank;
  int64_t* sizes;
};

struct Buffers {
  size_t size;
  Extension* extension;
  int64_t count;
  int* types;
  Buffer** buffers;
};

struct ByteSpan {
  const char* data;
  size_t size;
};

struct Array {
  int type;
  size_t count;
  void* data;
};

struct Attrs {
  size_t size;
  Extension* extension;
  int64_t count;
  int* types;
  ByteSpan** names;
  Array** attrs;  // of other types, too
};
constexpr int kArray = 1;

struct CallFrame {
  size_t size;
  Extension* extension;
  const Api* api;
  Context* ctx;
  int stage;  // kExecute
  Buffers args, rets;
  Attrs attrs;
};
constexpr int kExecute = 3;

// ---- arguments ----------------------------------------------------------------------------------

// Hands out buffers, in order, to pointers that are not NULL.
class BufferCursor {
 public:
  explicit BufferCursor(const Buffers& buffers) : buffers_(buffers) {}
  template <class T>
  void operator()(T*& pointer) {
    if (pointer == nullptr) return;
    enough_ = enough_ && index_ < buffers_.count;
    if (enough_) pointer = static_cast<T*>(buffers_.buffers[index_++]->data);
  }
  bool took_all() const { return enough_ && index_ == buffers_.count; }

 private:
  const Buffers& buffers_;
  int64_t index_ = 0;
  bool enough_ = true;
};

inline void take(bcy_gguf_matmul_args& args, BufferCursor& in, BufferCursor& out) {
  in(args.weight);
  in(args.x);
  in(args.bias);
  out(args.y);
  out(args.workspace);
}
inline void take(bcy_gguf_dequantize_args& args, BufferCursor& in, BufferCursor& out) {
  in(args.weight);
  out(args.y);
}
inline void take(bcy_nf4_weight& weight, BufferCursor& in) {
  in(weight.codes);
  in(weight.absmax);
}
inline void take(bcy_nf4_matmul_args& args, BufferCursor& in, BufferCursor& out) {
  take(args.weight, in);
  in(args.x);
  in(args.bias);
  out(args.y);
  out(args.workspace);
}
inline void take(bcy_nf4_dequantize_args& args, BufferCursor& in, BufferCursor& out) {
  take(args.weight, in);
  out(args.y);
}

template <class Args>
struct Problem {
  int64_t threads;
  Args args;
};

// Whether a call has all that the operation takes, and no more.
template <class Args>
bool read(const CallFrame& frame, Problem<Args>& problem) {
  const Attrs& attrs = frame.attrs;
  for (int64_t i = 0; i < attrs.count; ++i) {
    const ByteSpan& name = *attrs.names[i];
    if (name.size != 7 || memcmp(name.data, "problem", 7) != 0) continue;
    if (attrs.types[i] != kArray) return false;
    const Array& bytes = *attrs.attrs[i];
    if (bytes.count != sizeof problem) return false;
    memcpy(&problem, bytes.data, sizeof problem);
    BufferCursor in(frame.args), out(frame.rets);
    take(problem.args, in, out);
    return in.took_all() && out.took_all();
  }
  return false;
}

// ---- handlers -----------------------------------------------------------------------------------

inline Error* fail(const CallFrame& frame, int code, const char* message) {
  CreateError error = {sizeof error, nullptr, message, code};
  return frame.api->create_error(&error);
}

// Whether a call asks what the handler is, which is then answered.
inline bool answers_query(const CallFrame& frame, uint32_t traits) {
  for (Extension* it = frame.extension; it != nullptr; it = it->next) {
    if (it->type != kMetadata) continue;
    Metadata& metadata = *reinterpret_cast<MetadataExtension*>(it)->metadata;
    metadata.version.major = 0;
    metadata.version.minor = 1;  // the first that asks, and has all that is here
    metadata.traits = traits;
    return true;
  }
  return false;
}

inline const char kMismatch[] =
    "expected the arguments and buffers that this version of baracuda_cy traces a call with, got "
    "others; trace the program again";

}  // namespace bcy::xla
