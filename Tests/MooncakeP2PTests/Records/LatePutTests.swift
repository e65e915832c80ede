import Glibc
import MooncakeBase
import MooncakeEngine
import MooncakeMetadata
import MooncakeP2P
import MooncakeSystem
import MooncakeTestSupport
import Testing

/// Puts that are not answered and take effect after their entry was deleted.
@Suite struct LatePutTests {
  private struct Scene {
    let service: ServiceProcess
    let store: LateStore
    let keeper: RecordKeeper

    init(_ kind: ServiceProcess.Kind) throws {
      service = try ServiceProcess(kind)
      store = LateStore(try service.store())
      keeper = try RecordKeeper(
        StoreDirectory(store, prefix: "mooncake/", ttlMilliseconds: 2000))
    }

    func keys() throws -> [String] {
      try service.store().listAll(prefix: "", testCall).entries.map(\.key)
    }

    /// Whether only the record and the head of one name are there, and remain.
    func holdsOnly(_ name: String) throws -> Bool {
      func isSo() throws -> Bool {
        let keys = try keys()
        return keys.count == 2 && keys.allSatisfy { $0.contains(name) }
      }
      // A renewal is due every two thirds of a second; Redis drops keys after two.
      guard eventually(within: 6000, { (try? isSo()) == true }) else { return false }
      usleep(1_500_000)
      return try isSo()
    }
  }

  @Test(arguments: ServiceProcess.Kind.installed)
  func aRecordDoesNotOutliveItsDeletion(_ kind: ServiceProcess.Kind) throws {
    let scene = try Scene(kind)
    defer { scene.keeper.stop() }
    try scene.keeper.publish(testRecord("stays"), isCreateOnly: false, testCall)
    let late = testRecord("late", isOrigin: false, isComplete: false)
    scene.store.hold("store/holder/")
    scene.keeper.put(late, testCall)
    scene.keeper.remove(late, testCall)
    #expect(scene.store.deliver() >= 1)
    #expect(try scene.keys().count == 3)
    #expect(try scene.holdsOnly("stays"))
  }

  @Test(arguments: ServiceProcess.Kind.installed, [true, false])
  func aHeadDoesNotOutliveItsDeletion(
    _ kind: ServiceProcess.Kind, isCreateOnly: Bool
  ) throws {
    let scene = try Scene(kind)
    defer { scene.keeper.stop() }
    try scene.keeper.publish(testRecord("stays"), isCreateOnly: false, testCall)
    let late = testRecord("late")
    scene.store.hold("store/object/")
    #expect(
      code { try scene.keeper.publish(late, isCreateOnly: isCreateOnly, testCall) } == .timeout)
    #expect(scene.store.deliver() == 1)
    #expect(try scene.holdsOnly("stays"))
  }

  /// The service is frozen while payloads are published and withdrawn, and handles those requests
  /// when it resumes.
  @Test(arguments: ServiceProcess.Kind.installed.filter { $0 != .ours })
  func whatAFrozenServiceTakesLateGoes(_ kind: ServiceProcess.Kind) throws {
    let scene = try Scene(kind)
    defer { scene.keeper.stop() }
    try scene.keeper.publish(testRecord("stays"), isCreateOnly: false, testCall)
    let (replica, origin) = (testRecord("late", isOrigin: false), testRecord("late too"))
    var short: Call { Call(until: .after(milliseconds: 200)) }
    scene.service.freeze()
    scene.keeper.put(replica, short)
    scene.keeper.remove(replica, short)
    #expect(code { try scene.keeper.publish(origin, isCreateOnly: false, short) } == .timeout)
    scene.service.thaw()
    #expect(try scene.holdsOnly("stays"))
  }
}
