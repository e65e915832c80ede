// A C++11 program with RAII owners: several threads submit to their own batches at once, and
// destructors run in any order.
#include "mooncake.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

void require(int32_t code, const char* what) {
  if (code == MOONCAKE_OK) return;
  throw std::runtime_error(std::string(what) + ": " + mooncake_error_name(code) + ": " +
                           mooncake_error_message());
}

void require(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(what);
}

class Engine {
 public:
  Engine() { require(mooncake_engine_create(nullptr, &handle_), "create"); }
  ~Engine() { mooncake_engine_destroy(handle_); }
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  mooncake_engine_t* get() const { return handle_; }

  std::string name() const {
    uint64_t length = 0;
    mooncake_engine_name(handle_, nullptr, 0, &length);
    std::vector<char> text(length + 1);
    require(mooncake_engine_name(handle_, text.data(), text.size(), &length), "name");
    return std::string(text.data(), length);
  }

  mooncake_segment_t open(const std::string& name) const {
    mooncake_segment_t segment = -1;
    require(mooncake_segment_open(handle_, name.c_str(), 10000, &segment), "open");
    return segment;
  }

 private:
  mooncake_engine_t* handle_ = nullptr;
};

class Buffer {
 public:
  Buffer(const Engine& engine, size_t length, uint32_t access)
      : engine_(engine), bytes_(length) {
    require(mooncake_memory_register(engine.get(), bytes_.data(), length, nullptr, access),
            "register");
  }
  ~Buffer() { mooncake_memory_unregister(engine_.get(), bytes_.data()); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  std::vector<unsigned char>& bytes() { return bytes_; }
  uint64_t address(size_t offset) const {
    return reinterpret_cast<uintptr_t>(bytes_.data()) + offset;
  }

 private:
  const Engine& engine_;
  std::vector<unsigned char> bytes_;
};

class Batch {
 public:
  Batch(const Engine& engine, uint64_t capacity) : engine_(engine) {
    require(mooncake_batch_create(engine.get(), capacity, &id_), "batch");
  }
  ~Batch() {
    if (mooncake_batch_free(engine_.get(), id_) == MOONCAKE_OK) return;
    mooncake_batch_cancel(engine_.get(), id_);
    mooncake_batch_wait(engine_.get(), id_, 10000, nullptr);
    mooncake_batch_free(engine_.get(), id_);
  }
  Batch(const Batch&) = delete;
  Batch& operator=(const Batch&) = delete;

  void submit(const std::vector<mooncake_transfer_request_t>& requests) {
    require(mooncake_batch_submit(engine_.get(), id_, requests.data(), requests.size(), 20000),
            "submit");
  }

  mooncake_batch_status_t wait() {
    mooncake_batch_status_t status = mooncake_batch_status_t();
    require(mooncake_batch_wait(engine_.get(), id_, 20000, &status), "wait");
    return status;
  }

 private:
  const Engine& engine_;
  mooncake_batch_t id_ = 0;
};

const size_t kThreadCount = 4;
const size_t kRoundCount = 40;
const size_t kRequestCount = 16;
const size_t kBlock = 16 * 1024;
const size_t kShare = kRequestCount * kBlock;

mooncake_transfer_request_t make_request(int32_t opcode, mooncake_segment_t segment,
                                         unsigned char* source, uint64_t target, size_t length) {
  mooncake_transfer_request_t request = mooncake_transfer_request_t();
  request.opcode = opcode;
  request.segment = segment;
  request.source = source;
  request.target_offset = target;
  request.length = length;
  return request;
}

void move_all(const Engine& engine, int32_t opcode, mooncake_segment_t segment,
              unsigned char* source, uint64_t target) {
  Batch batch(engine, kRequestCount);
  std::vector<mooncake_transfer_request_t> requests;
  for (size_t index = 0; index < kRequestCount; index += 1) {
    requests.push_back(make_request(opcode, segment, source + index * kBlock,
                                    target + index * kBlock, kBlock));
  }
  batch.submit(requests);
  const mooncake_batch_status_t status = batch.wait();
  require(status.state == MOONCAKE_STATE_COMPLETED, "a batch did not complete");
  require(status.completed_count == kRequestCount, "completed_count");
  require(status.transferred_bytes == kShare, "transferred_bytes");
}

// Repeatedly writes this thread's share of the target, reads it back elsewhere and compares.
void work(const Engine& engine, mooncake_segment_t segment, uint64_t target, size_t number) {
  Buffer sent(engine, kShare, MOONCAKE_ACCESS_LOCAL);
  Buffer received(engine, kShare, MOONCAKE_ACCESS_LOCAL);
  for (size_t round = 0; round < kRoundCount; round += 1) {
    for (size_t index = 0; index < kShare; index += 1) {
      sent.bytes()[index] =
          static_cast<unsigned char>(index * 31 + index / 251 + round * 7 + number * 101);
    }
    std::fill(received.bytes().begin(), received.bytes().end(), 0);
    move_all(engine, MOONCAKE_OPCODE_WRITE, segment, sent.bytes().data(), target);
    move_all(engine, MOONCAKE_OPCODE_READ, segment, received.bytes().data(), target);
    require(sent.bytes() == received.bytes(), "what was read is not what was written");
  }
}

void run_threads() {
  Engine target;
  Buffer memory(target, kThreadCount * kShare,
                MOONCAKE_ACCESS_REMOTE_READ | MOONCAKE_ACCESS_REMOTE_WRITE);
  Engine initiator;
  const mooncake_segment_t segment = initiator.open(target.name());
  std::vector<std::thread> threads;
  std::vector<std::string> failures(kThreadCount);
  for (size_t number = 0; number < kThreadCount; number += 1) {
    threads.emplace_back([&, number] {
      try {
        work(initiator, segment, memory.address(number * kShare), number);
      } catch (const std::exception& error) {
        failures[number] = error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& failure : failures) {
    if (!failure.empty()) throw std::runtime_error(failure);
  }
}

// Owners that outlive their engine, as static objects may, only get errors.
void end_in_the_wrong_order() {
  std::unique_ptr<Engine> engine(new Engine);
  Buffer buffer(*engine, 4096, MOONCAKE_ACCESS_LOCAL);
  mooncake_engine_t* handle = engine->get();
  mooncake_batch_t batch = 0;
  require(mooncake_batch_create(handle, 1, &batch), "batch");
  require(mooncake_engine_destroy(handle), "destroy");
  require(mooncake_batch_free(handle, batch) == MOONCAKE_ERROR_INVALID_HANDLE, "late free");
  require(mooncake_memory_unregister(handle, buffer.bytes().data()) ==
              MOONCAKE_ERROR_INVALID_HANDLE,
          "late unregister");
}

}  // namespace

int main() {
  try {
    run_threads();
    end_in_the_wrong_order();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "raii: %s\n", error.what());
    return 1;
  }
  return 0;
}
