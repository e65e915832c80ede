import MooncakeSystem
import Synchronization

/// The owner's side of the table of registrations.
struct SharedTable: ~Copyable, @unchecked Sendable {
  // Unchecked: its server writes it under a lock.
  let file: MemoryFile
  private let mapping: MemoryMapping

  init() throws(Errno) {
    let file = try MemoryFile(name: "mooncake-table", byteCount: SharedMemoryLayout.tableBytes)
    let mapping = try file.map(writable: true)
    try file.sealAgainstWriters()
    self.file = file
    self.mapping = mapping
  }

  /// Replaces every entry.
  func write(_ buffers: [BufferTable.Buffer]) {
    let version = word(SharedMemoryLayout.versionOffset)
    let entries = (mapping.address + SharedMemoryLayout.entriesOffset)
      .assumingMemoryBound(to: SharedMemoryLayout.Entry.self)
    version.pointee.wrappingAdd(1, ordering: .sequentiallyConsistent)
    word(SharedMemoryLayout.countOffset).pointee
      .store(UInt64(buffers.count), ordering: .sequentiallyConsistent)
    buffers.withUnsafeBufferPointer { buffers in
      var index = 0
      while index < buffers.count {
        entries[index].address = buffers[index].range.address
        entries[index].length = buffers[index].range.length
        entries[index].memoryOffset = buffers[index].place?.offset ?? 0
        entries[index].access = buffers[index].range.access.rawValue
        entries[index].memory = buffers[index].place?.memory ?? 0
        index += 1
      }
    }
    version.pointee.wrappingAdd(1, ordering: .sequentiallyConsistent)
  }

  /// Makes peers read the table again before their next copy.
  func changeGuard() {
    word(SharedMemoryLayout.guardOffset).pointee
      .wrappingAdd(1, ordering: .sequentiallyConsistent)
  }

  private func word(_ offset: Int) -> UnsafeMutablePointer<Atomic<UInt64>> {
    (mapping.address + offset).assumingMemoryBound(to: Atomic<UInt64>.self)
  }
}

/// A peer's side of the table.
struct SharedTableReader: ~Copyable, @unchecked Sendable {
  // Unchecked: the words are atomic; the version tells whether entries were read whole.
  private let mapping: MemoryMapping
  private let base: UnsafeMutableRawPointer

  init(_ file: borrowing MemoryFile) throws(Errno) {
    mapping = try file.map(writable: false)
    base = mapping.address
  }

  var guardWord: UnsafeRawPointer { UnsafeRawPointer(base + SharedMemoryLayout.guardOffset) }

  @inline(__always)
  var guardValue: UInt64 { word(SharedMemoryLayout.guardOffset) }

  var version: UInt64 { word(SharedMemoryLayout.versionOffset) }

  /// The guard and the entries, which are as new as it or newer; nil if the owner is stuck in the
  /// middle of a change.
  func read() -> (guardValue: UInt64, version: UInt64, entries: [SharedMemoryLayout.Entry])? {
    for attempt in 0..<100 {
      // The guard first: it is then never newer than the entries.
      let guardValue = self.guardValue
      let version = self.version
      let count = word(SharedMemoryLayout.countOffset)
      if version & 1 == 0 && count <= UInt64(BufferTable.capacity) {
        let entries = copyEntries(Int(count))
        if self.version == version { return (guardValue, version, entries) }
      }
      if attempt < 50 { relaxProcessor() } else { sleepBriefly(nanoseconds: 100_000) }
    }
    return nil
  }

  private func copyEntries(_ count: Int) -> [SharedMemoryLayout.Entry] {
    if count == 0 { return [] }
    let source = base + SharedMemoryLayout.entriesOffset
    return Array(unsafeUninitializedCapacity: count) { entries, initializedCount in
      UnsafeMutableRawBufferPointer(entries).copyMemory(
        from: UnsafeRawBufferPointer(
          start: source, count: count * MemoryLayout<SharedMemoryLayout.Entry>.stride))
      // The entries are loaded before the version is read again.
      atomicMemoryFence(ordering: .acquiring)
      initializedCount = count
    }
  }

  @inline(__always)
  private func word(_ offset: Int) -> UInt64 {
    (base + offset).assumingMemoryBound(to: Atomic<UInt64>.self)
      .pointee.load(ordering: .sequentiallyConsistent)
  }
}
