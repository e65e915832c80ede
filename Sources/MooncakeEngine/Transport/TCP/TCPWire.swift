import CLinux

/// Mooncake's TCP framing: a 24-byte request header (size, address, opcode, padding) and, in
/// version 2, an 8-byte status frame (code, magic) before read data and after write data. Numbers
/// are little-endian.
package enum TCPWire {
  package static let headerBytes = 24
  package static let statusBytes = 8
  package static let acknowledgedBit: UInt8 = 0x80
  private static let statusMagic: UInt64 = 0x4D43_5456 << 32

  package static let statusOK: UInt64 = statusMagic
  package static let statusRejected: UInt64 = statusMagic | 1

  /// The header of a request.
  package struct Header: Equatable, Sendable {
    package var size: UInt64
    package var address: UInt64
    package var opcode: Opcode
    package var isAcknowledged: Bool

    package init(size: UInt64, address: UInt64, opcode: Opcode, isAcknowledged: Bool) {
      self.size = size
      self.address = address
      self.opcode = opcode
      self.isAcknowledged = isAcknowledged
    }

    /// Reads 24 bytes. Every bit pattern is a valid header: any opcode but write is a read.
    @inline(__always)
    package init(_ bytes: UnsafeRawPointer) {
      size = UInt64(littleEndian: bytes.loadUnaligned(as: UInt64.self))
      address = UInt64(littleEndian: bytes.loadUnaligned(fromByteOffset: 8, as: UInt64.self))
      let code = bytes.load(fromByteOffset: 16, as: UInt8.self)
      opcode = code & ~TCPWire.acknowledgedBit == 1 ? .write : .read
      isAcknowledged = code & TCPWire.acknowledgedBit != 0
    }

    /// Writes 24 bytes, the padding as zeros.
    @inline(__always)
    package func write(to bytes: UnsafeMutableRawPointer) {
      bytes.storeBytes(of: size.littleEndian, as: UInt64.self)
      bytes.storeBytes(of: address.littleEndian, toByteOffset: 8, as: UInt64.self)
      let code = UInt64(opcode == .write ? 1 : 0) | (isAcknowledged ? 0x80 : 0)
      bytes.storeBytes(of: code.littleEndian, toByteOffset: 16, as: UInt64.self)
    }
  }

  package enum Status: Equatable, Sendable {
    case ok
    /// The target refused the address range.
    case rejected
    /// The magic is right, the code is unknown to this version.
    case failed(UInt32)
    /// Not a status frame: the peer speaks another protocol.
    case malformed

    @inline(__always)
    package init(_ bytes: UnsafeRawPointer) {
      let word = UInt64(littleEndian: bytes.loadUnaligned(as: UInt64.self))
      if word == TCPWire.statusOK {
        self = .ok
      } else if word >> 32 != TCPWire.statusMagic >> 32 {
        self = .malformed
      } else {
        self =
          UInt32(truncatingIfNeeded: word) == 1
          ? .rejected : .failed(UInt32(truncatingIfNeeded: word))
      }
    }
  }

  /// Socket buffers of connections inside one host, so small that data in flight stays in the
  /// processors' caches between its two copies. Elsewhere the kernel tunes them to the path.
  package static let localSocketBufferBytes: Int32 = 512 << 10
  /// Data bytes of one send call: enough to amortize it, few enough for the cache.
  package static let sendChunkBytes = 256 << 10
  /// Pieces of one gathered send or scattered receive.
  package static let vectorLimit = 128
}
