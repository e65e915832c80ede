/// The layout of what processes of one host share. Every change of it needs another `magic`, so
/// that versions with different layouts use TCP.
enum SharedMemoryLayout {
  /// First word of the greeting.
  static let magic: UInt64 = 0x0001_4D48_534E_4F4D

  // The table of registrations, written by its owner and mapped read-only by peers.

  /// Changes whenever a registration ends; copies are guarded by it.
  static let guardOffset = 0
  /// Changes whenever the table does; odd while it is being written.
  static let versionOffset = 64
  static let countOffset = 72
  static let entriesOffset = 128
  static let tableBytes = entriesOffset + BufferTable.capacity * MemoryLayout<Entry>.stride

  /// A registered range, in order of address.
  struct Entry {
    var address: UInt64
    var length: UInt64
    /// Where the range begins in `memory`.
    var memoryOffset: UInt64
    /// `Access`.
    var access: UInt32
    /// Number of the owner's memory file that holds the range; 0 for ordinary memory.
    var memory: UInt32
  }

  // The slots of one peer, in which it announces its copies.

  static let slotCount = 64
  /// A cache line each.
  static let slotBytes = 64
  static let slotsBytes = slotCount * slotBytes

  /// First message of the owner; carries the table and the slots.
  struct Greeting {
    var magic = SharedMemoryLayout.magic
    /// A word of the owner's memory and its value: a peer for which the kernel reads it rightly may
    /// let the kernel copy.
    var probeAddress: UInt64 = 0
    var probeValue: UInt64 = 0
    /// How many `Notice`s follow immediately.
    var memoryCount: UInt64 = 0
  }

  /// Later messages of the owner.
  struct Notice {
    var kind: UInt32
    var memory: UInt32
    var byteCount: UInt64 = 0
    var isWritable: UInt64 = 0

    /// Carries the descriptor of a memory file.
    static let offered: UInt32 = 1
    /// The memory file holds no registered range any more.
    static let withdrawn: UInt32 = 2
  }
}
